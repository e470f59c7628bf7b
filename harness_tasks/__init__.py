"""lm-eval tasks over MedForget: ``lm_eval --include_path harness_tasks --tasks 'medforget_*'``.

The YAML files and the two modules they name, `rows` and `scores`, need only lm-eval, datasets and rouge_score, so this
folder also works as a copy inside lm-eval's own tasks directory.
"""
