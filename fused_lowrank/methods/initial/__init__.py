"""First values of factors: functions, the names that rows give them, and what they are made of."""
