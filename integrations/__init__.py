"""One module per host library. Installed as `bitune_plugin.integrations`."""
