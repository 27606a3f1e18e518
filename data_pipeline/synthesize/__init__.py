"""Instruction data of LLaVA's kind, written by a language model that reads captions and boxes in place of the picture.

contexts.py    what is known of a picture: captions and boxes, and their text
prompts.py     system text, few-shot examples and questions, from a folder that a user can replace
parsing.py     what a reply must be: questions and answers, or the name of what is wrong with it
responses.py   every reply that was paid for, on disk before the next one is asked for
account.py     tokens, cost, the budget
asking.py      one request: tries, waits, what is transient and what is not
run.py         the whole: ask for what is missing, then write what is there
output.py      LLaVA JSON, rejects, manifest
draw.py        a mix of types of a given size, such as the 1,000 samples of Vision-Flan's stage 2
"""
