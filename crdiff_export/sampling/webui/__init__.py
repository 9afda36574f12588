"""POA in the web UIs: A1111, Forge, Forge Classic, reForge and SD.Next.

Begin with `script`, the accordion that all of these UIs show. It makes `settings` of what the user chose, opens the
file (`source`), and calls the adapter of the UI that it runs in: `reforge`, `forge`, `a1111` or `sdnext`, each with a
function `apply`. `ui` finds out which UI a folder has, `install` writes the extension there. The UIs' own modules are
imported in functions only, so that this folder can be imported without them.
"""
