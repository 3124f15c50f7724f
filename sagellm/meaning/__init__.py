"""Whether passes keep what a graph means: both graphs are evaluated by `sagellm.ir.reference` and compared."""
