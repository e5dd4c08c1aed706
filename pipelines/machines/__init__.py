"""What the work runs on: the Ray cluster, pools of actors, progress, errors at the edge."""
