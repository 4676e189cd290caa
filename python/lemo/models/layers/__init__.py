"""The layers of a decoder on the rows that they keep, and the loss behind them."""
