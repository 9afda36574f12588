"""How the demo model is made: `tools/train_demo.py` runs it, `run.py` tells the story in order."""
