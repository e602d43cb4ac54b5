"""The stages that make the demo model: one module each, run by train_demo.py."""
