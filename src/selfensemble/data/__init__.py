"""Images and labels: folders, data sets of the hub, parquet files."""
