"""Trainings: of a teacher, and of a student by distillation."""
