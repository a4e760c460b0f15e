"""Studies: sets of runs that differ in their optimizer or in a few keys, over several seeds, and what came of them."""
