"""Examples in memory, on disk, and spread over devices; their moments."""
