"""The plugins that Bitune ships: they use the same hooks as everybody's."""
