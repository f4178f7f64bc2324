"""Examples: in memory, on disk, spread over devices; their moments."""
