"""Studies: grids of ordinary launches that ask one question of a paper.  python -m vflax.study --study=NAME"""
