"""`medforget browse`: a page that shows a dataset, a run's results, and what its checkpoints answer side by side.

Only `page.py` and the tabs beside it need Gradio.
"""
