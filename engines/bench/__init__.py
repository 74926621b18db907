"""What smc-bench is made of: points, timing, the floor, the profile of a round, and how all of it is shown."""
