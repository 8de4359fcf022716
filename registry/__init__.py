"""What exists: the names and facts of teachers, students, datasets, benchmarks and tiers."""
