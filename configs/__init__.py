"""Settings, errors and small file helpers shared by every stage; needs neither torch nor an engine."""
