"""Facts from profiler traces: readers for nsys and Kineto files, interval algebra, and the tables made from them."""
