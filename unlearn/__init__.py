"""Fine-tuning and unlearning of Qwen2.5-VL models on MedForget, with TRL."""
