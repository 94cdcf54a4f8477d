"""The study: methods compared at equal defence on a real model, cell by cell, and what it found written down."""
