"""Task files that work: `python -m data_pipeline.author new FILE --example=NAME` copies one."""
