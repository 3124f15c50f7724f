"""Is what a vendor's code generator emits what the vendor's libraries take, without the chip? See `docs/hardware.md`.

`stand_in.py` puts references in the place of a vendor's calls, `scenario.py` is what the engine is made to do over
them, `operations.py` has what these models do not, `verify.py` compares, `models.py` makes the models.
"""
