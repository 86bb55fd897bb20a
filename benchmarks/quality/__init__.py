"""Detection quality: the GRU beside its peers on the handbook's folds, on Sparkov and on the simulator.

`handbook` the folds, `fitting` the GRU fitted for a fixed number of epochs, `__main__` its runs; `peers` the other models,
`calibrating` and `measures` what is compared, `compare` the command; `order`, `ablation` (`variants`) what the parts bring;
`pictures` and `page` write docs/quality.md from the `results`.
"""
