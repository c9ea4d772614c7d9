"""What the steps do: functions that take a `Job` and return a `Result`, each called in a process of its own."""
