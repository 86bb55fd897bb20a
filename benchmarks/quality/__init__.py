"""Detection quality: the GRU beside its peers on the handbook's folds, on Sparkov and on the simulator.

`handbook` the folds, `fitting` the GRU fitted for a fixed number of epochs, `__main__` the command.
`results` what the result files hold, `pictures` customers and terminals drawn, `page` the tables of docs/quality.md.
"""
