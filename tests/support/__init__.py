"""What several tests share, and the child processes that they kill."""
