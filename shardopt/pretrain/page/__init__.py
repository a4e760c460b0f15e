"""The page that `shardopt report` writes: runs as curves and tables, in one HTML file that needs no network."""
