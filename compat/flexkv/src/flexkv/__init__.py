"""The import paths of FlexKV that engines ship with. What they do is `flexkv_core`'s."""
