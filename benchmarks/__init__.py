"""What attention costs: one file a table, over workloads that are named once. `make bench` runs benchmarks/cpu.py."""
