"""How models answer, and whose answers are liked better: by numbers, by a judge, by people."""
