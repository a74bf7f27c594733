"""Tasks of the lm-evaluation-harness (EleutherAI): its definitions, its numbers, item by item; on any of several engines."""
