"""What lowbit does, as plain functions: they join the pipeline, the formats, the evaluation and the report."""
