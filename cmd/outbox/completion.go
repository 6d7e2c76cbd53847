package main

import (
	"fmt"
	"slices"
	"strings"

	"github.com/alecthomas/kong"
)

type completionCmd struct {
	Shell string `arg:"" enum:"bash,zsh,fish" help:"bash, zsh or fish."`
}

// Help implements kong.HelpProvider.
func (*completionCmd) Help() string {
	return `Examples:
  source <(outbox completion bash)
  outbox completion zsh > "${fpath[1]}/_outbox"
  outbox completion fish > ~/.config/fish/completions/outbox.fish`
}

// The scripts ask the binary itself, so that they never lag behind it.
var completionScripts = map[string]string{
	"bash": `_outbox() {
  local IFS=$'\n'
  COMPREPLY=($(outbox __complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _outbox outbox
`,
	"zsh": `#compdef outbox
_outbox() {
  local -a found
  found=(${(f)"$(outbox __complete -- "${(@)words[2,CURRENT]}" 2>/dev/null)}")
  if (( ${#found} )); then compadd -a found; else _files; fi
}
compdef _outbox outbox
`,
	"fish": `complete -c outbox -a '(outbox __complete -- (commandline -opc)[2..] (commandline -ct) 2>/dev/null)'
`,
}

// Run prints the script.
func (c *completionCmd) Run(s streams) error {
	_, err := fmt.Fprint(s.out, completionScripts[c.Shell])
	return err
}

// completeCmd answers the completion scripts: what the last word may become.
type completeCmd struct {
	Words []string `arg:"" optional:"" passthrough:""`
}

// Run prints one candidate per line.
func (c *completeCmd) Run(s streams, parser *kong.Kong) error {
	words := c.Words
	if len(words) > 0 && words[0] == "--" {
		words = words[1:]
	}
	_, err := fmt.Fprint(s.out, strings.Join(append(complete(parser.Model.Node, words), ""), "\n"))
	return err
}

// complete returns what the last of the words may become, below the command that the words before it select.
func complete(node *kong.Node, words []string) []string {
	last := ""
	if len(words) > 0 {
		last = words[len(words)-1]
		words = words[:len(words)-1]
	}
	flags := slices.Clone(node.Flags)
	for _, word := range words {
		for _, child := range node.Children {
			if child.Name == word {
				node = child
				flags = append(flags, child.Flags...)
				break
			}
		}
	}
	var found []string
	add := func(candidate string) {
		if strings.HasPrefix(candidate, last) {
			found = append(found, candidate)
		}
	}
	previous := ""
	if len(words) > 0 {
		previous = words[len(words)-1]
	}
	for _, flag := range flags {
		if flag.IsBool() || previous != "--"+flag.Name && (flag.Short == 0 || previous != "-"+string(flag.Short)) {
			continue
		}
		// The value of a flag: one of its set, or none of our business (a file, an address).
		for _, value := range flag.EnumSlice() {
			add(value)
		}
		slices.Sort(found)
		return found
	}
	if strings.HasPrefix(last, "-") {
		for _, flag := range flags {
			if !flag.Hidden {
				add("--" + flag.Name)
			}
		}
	} else {
		for _, child := range node.Children {
			if !child.Hidden {
				add(child.Name)
			}
		}
		for _, positional := range node.Positional {
			for _, value := range positional.EnumSlice() {
				add(value)
			}
		}
	}
	slices.Sort(found)
	return slices.DeleteFunc(found, func(s string) bool { return s == "" })
}
