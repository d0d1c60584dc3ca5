"""Where versions are kept: a directory that workers and engines share, or object storage with copies on each host."""
