"""Speed and memory, checked against float64 and beside what people use: python -m benchmarks [run | plot | table]"""
