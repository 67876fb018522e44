"""Programs that try to break the package: damaged files, crashes, bad machines."""
