"""Where people come in: the `hybrid` command. One command a module; heavy imports wait inside commands."""
