"""From the runs of a sweep in MLflow to a page, tables and figures. Reads no run folder, trains nothing, imports no torch."""
