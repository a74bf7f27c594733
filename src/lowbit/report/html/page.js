"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.documentElement;
  const select = document.getElementById("run");
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const colour = (name) => getComputedStyle(root).getPropertyValue(name).trim();
  const settings = { responsive: true, displayModeBar: false };

  const themed = (layout) => {
    const axis = { gridcolor: colour("--grid"), linecolor: colour("--line"), zerolinecolor: colour("--grid"), automargin: true };
    const whole = { ...layout, paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
      font: { color: colour("--fore"), family: "inherit", size: 13 } };
    for (const key of Object.keys(layout).filter((name) => /^[xy]axis/.test(name))) whole[key] = { ...layout[key], ...axis };
    return whole;
  };
  const draw = (id, figure) => {
    const place = document.getElementById(id);
    if (place && figure) Plotly.react(place, figure.data, themed(figure.layout), settings);
  };
  const show = () => {
    const chosen = Number(select.value);
    for (const part of document.querySelectorAll(".run")) part.hidden = Number(part.dataset.run) !== chosen;
    for (const [id, figure] of Object.entries(data.scatters)) draw(id, figure);
    const heat = data.heat[chosen];
    document.getElementById("heat").hidden = !heat;
    document.getElementById("heat-none").hidden = Boolean(heat);
    if (heat) draw("heat", heat);
    if (data.kl) {
      const lines = data.kl.data.map((line) => ({ ...line, opacity: line.meta === chosen ? 1 : 0.45,
        line: { ...line.line, width: line.meta === chosen ? 4 : 1.5 } }));
      draw("kl", { data: lines, layout: data.kl.layout });
    }
  };
  select.addEventListener("change", show);
  dark.addEventListener("change", show);
  document.getElementById("theme").addEventListener("click", () => {
    const isDark = root.dataset.theme ? root.dataset.theme === "dark" : dark.matches;
    root.dataset.theme = isDark ? "light" : "dark";
    show();
  });
  show();
  root.dataset.ready = "yes";
})();
