"""Where runs run: submission to a Ray cluster by its Jobs API, jobs, TensorBoard, a doctor for clusters, and templates that start one."""
