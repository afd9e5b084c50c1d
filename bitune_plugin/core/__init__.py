"""The method on tensors: mixing, attention masks, and which token goes where. Knows no model.

Letters of shapes, in all docstrings and comments of the package:

    B     rows of the caller's batch
    T     tokens of a caller's row
    P     tokens of a prompt
    R     lengthened rows
    L     places of the causal stream in a lengthened row
    M     places of a lengthened row
    D     sequences
    E     slots of an encoded prompt
    A     slots of an answer
    Q, K  queries and keys of one attention call
    N     tokens of a batch that are not padding
    n     tokens selected from all rows, such as those of all answers
    H     hidden size
"""
