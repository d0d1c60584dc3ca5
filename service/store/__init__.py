"""What is true and how it changes: functions over one open transaction each. No HTTP, no engine calls."""
