"""What to run: one short file per stage, get_config(variant) -> ConfigDict."""
