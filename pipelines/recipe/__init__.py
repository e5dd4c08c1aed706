"""What a run is asked to do: typed recipes, the paper's and the demo's, and what they need."""
