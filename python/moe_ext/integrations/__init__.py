"""Other libraries' models on moe_ext's ops; each module imports its library only when it is used."""
