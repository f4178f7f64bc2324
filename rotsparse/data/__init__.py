"""Examples in memory, on disk and spread over devices, and their moments."""
