"""What a bounded cache costs a model: tasks, ways to bound it, records, statistics, reports."""
