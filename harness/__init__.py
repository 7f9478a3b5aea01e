"""A benchmarking and correctness harness for RWKV-4: plan, isolate, measure, compare, store."""
