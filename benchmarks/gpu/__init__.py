"""What benchmarks/gpu.sh measures beside the benchmark against TRL."""
