"""Where the two readings of a program meet: tracing, values, costs."""
