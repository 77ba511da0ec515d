"""What is scored: windows of a text, recall episodes, multiple-choice and generated tasks."""
